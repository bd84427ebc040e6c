"""Every message of the system, one file per receiver.

Start with `codec.py` (the envelope), then `hmm.py`, `pool.py`, `rank.py`, `router.py`, `scaler.py`: each lists what
that process can be told, as one closed union. `signals.py` has what routers and ranks tell the scaler unasked,
`replies.py` the two answers that any request may get, `errors.py` the errors with their stable codes, `limits.py` every
bound.
"""
