"""Each test begins with an empty card; see ``evidence``, where types are checked."""

from evidence import fresh_card, light_collections

__all__ = ["fresh_card", "light_collections"]
