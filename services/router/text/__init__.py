"""From texts and conversations to tokens, as transformers reads a checkpoint's tokenizer files.

`files` reads them, `classes` and `special` say what transformers makes of them, `backend` builds the tokenizer, and
`template` renders conversations.
"""
