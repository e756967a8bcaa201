"""`antiphon.langchain`: chat model and middleware for LangChain and LangGraph."""
