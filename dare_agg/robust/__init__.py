"""Rules that bear Byzantine clients: pure functions over the updates that a round accepted.

A round's deltas are rows over the same survivors (`rows`); bounds, pre-aggregation and most rules
work on their scalar products alone (`mixture`, `before`, `selection`), and rules that vote on each
element read them tile by tile (`votes`). `aggregate` composes the stages of a `rule`, which are
rows of one table (`stages`).
"""
