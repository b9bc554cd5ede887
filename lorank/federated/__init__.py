"""One model trained by several owners of text, who send low-rank factors and keep the text.

A rule (`lorank.federated.table`) is a pure function: the factors that clients began a round with and those that they trained go in,
the next ones come out. `private` and `sparse` change what a client sends, under any rule. `server` and `client` are the two sides of
a round, `local` runs both in one process, and `flower` runs them in Flower.
"""
