"""`antiphon.client`: sessions for Python programs, sync and async."""
