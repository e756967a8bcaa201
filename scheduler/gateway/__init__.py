"""The gateway: what clients speak to. It makes rounds of requests and answers of rounds; it knows no core.

app.py         the ASGI app: routes, health, metrics, receipts
completions.py one completion request: submitted and answered, or explained
intake.py      before that: read whole, checked, made a round
requests.py    checks of what clients send
identity.py    whose round it is: the session id
message_chain.py  what a conversation looks like from outside: a hash chain over its messages
prompts.py     tokenizer and chat template
relay.py       chunks -> events of a stream, or one answer
"""
