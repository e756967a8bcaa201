"""`antiphon.langchain`: chat model and middleware for LangChain and LangGraph.

chat_model.py  ChatAntiphon: LangChain's chat model on an Antiphon gateway
middleware.py  SessionMiddleware: sessions, tool times and ends of runs, for agents with any OpenAI chat model
session.py     whose round a call is: ids from thread id and checkpoint namespace
hints.py       what a caller may say of a round, and how it goes onto the wire
per_loop.py    HTTP connections for clients that are used in several event loops

The middleware needs the package langchain too: `from antiphon.langchain.middleware import SessionMiddleware`.
"""

from antiphon.langchain.chat_model import ChatAntiphon
from antiphon.langchain.session import SessionKey, session_from_config

__all__ = ["ChatAntiphon", "SessionKey", "session_from_config"]
