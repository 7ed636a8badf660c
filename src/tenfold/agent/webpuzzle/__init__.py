"""WebPuzzle (section 3.1 of the paper): questions with known answers, made from any pool of pages and checked.

Stages, each a file of JSON lines: pool, make, verify, tag, stats (see `stages`).
"""
