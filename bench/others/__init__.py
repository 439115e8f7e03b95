"""dfproxy beside other engines for durable work: `python -m bench.others [ENGINE ...]`. Not part of `make bench`.

Each engine does the same: workflows of three UPDATE steps, 32 at a time, in the same server, set up as its makers
advise for steps that must not be lost. What is not installed is left out (`pip install '.[others]'`).
"""
