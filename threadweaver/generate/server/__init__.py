"""Generation by another engine: the state machine here, its requests at a completions server.

address     where the server is, which models it offers, and what it is sent by HTTP
completions what a request is in the words of the server: token ids or text, in and out
engine      the state machines of many responses, their requests at once
"""
