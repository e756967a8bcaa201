"""The gateway: what clients speak to. It makes rounds of requests and answers of rounds; it knows no core.

app.py         the ASGI app: routes, health, metrics, receipts
completions.py one completion request: submitted and answered, or explained
intake.py      before that: read whole, checked, made a round
requests.py    checks of what clients send
retried.py     requests that are made again: of which call they are a try, answers that are given again
identity.py    whose round it is: the session id
sessions.py    the resource /v1/sessions: made, looked at, changed, forked, closed
session_fields.py  what a request says of its session: the signals that name it, and hints
message_chain.py  what a conversation looks like from outside: a hash chain over its messages
prompts.py     tokenizer and chat template
templates.py   whether a chat template can be rendered piece by piece, and how
history.py     prompts that go on with what was said, as the ids that were served
conversations.py  what was said: looked up before a round, added to after it
drain_route.py  /v1/engines/{id}/drain
rounds_route.py   POST /v1/sessions/{id}/rounds: only what is new
tenants.py     the gate: API key -> tenant; caller.py: who that is, for whoever asks
salts.py       what keeps tenants' KV apart
overload.py    what a replica takes on at once; beyond that: 503
seats.py       how many are under way, of a replica or a key; retries sit with their first try
limits.py      how much a key may do; token_bucket.py: tokens per minute, as sums
message_checks.py  of a chat's messages; error_shapes.py: errors as a route's clients expect them
relay.py       chunks -> events of a stream, or one answer
translated.py  other APIs as chats: a request in, the chat's events out; blocks.py: what such events hold
responses.py   /v1/responses as a chat, response_events.py back again, responses_route.py the HTTP of it
response_calls.py  responses that are asked for again: which one that is, and where it begins
messages.py    /v1/messages (Anthropic's), message_events.py, messages_route.py: the same
tokenize.py    /tokenize and /detokenize
surface.py     the routes of all these
openapi.py     the document of every route, openapi_operations.py: the table of them;
               openapi_bodies.py: what they take, openapi_schemas.py: what they answer
"""
