"""Which attention backends there are. Torch-free."""

from typing import Literal

Backend = Literal["auto", "sdpa", "flex", "flash", "xformers"]
