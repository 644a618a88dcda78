"""The claims of DDPM, tried: `python -m benchmarks.claims` trains, measures and prints tables (docs/claims.md).

data.py      digits or Fashion-MNIST, with a held-out split of its own; how much work each is given
cache.py     stages on disk, each under a hash of all that decides it
forward.py   the closed form of the forward process against iterated noise
study.py     the models that are compared: training, bits/dim, drawing, Frechet distance
table.py     Markdown out of what is there
"""
