"""Language modelling on the user's own files.

`files` finds and reads documents, `tokens` makes and loads a tokenizer, `corpus` keeps the tokens in a cache
that is verified, `rows` cuts them into sequences.
"""
