"""What is found out about a graph before it is rewritten; nothing here changes one.

`axes` follows the rows of the batch through every operation, `targets` finds the layers that can carry an adapter,
`lane_cut` where lanes begin, `narrowing` what can be computed for some positions alone, `costs` what a call costs.
May import `graph`, `format`, `config`, `step`; knows neither passes nor backends.
"""
