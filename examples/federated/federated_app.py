"""lorank's server and clients as apps of Flower; their settings are in pyproject.toml."""

from lorank.federated.flower import apps

both = apps()
server = both[0]  # Flower reads these two names without running the file
client = both[1]
