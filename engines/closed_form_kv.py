"""KV of a closed-form engine: device pool and page store, as its requests use them.

As `virtual_kv.py` without tokens. Copying a page into the store takes no time here, and the store keeps
only what continues a chain that it has: what follows a missing page could not be found. A page that the store
evicts while the device has it is not offered again.
"""

from __future__ import annotations

from antiphon.engines.closed_form_request import EngineRequest
from antiphon.engines.held import Held
from antiphon.engines.tiers import Tier


class ClosedFormKv:
    """Both tiers. A request that has been admitted locks `tree_pages` and owns the pages behind them."""

    __slots__ = ("device", "page_tokens", "store")

    def __init__(self, device_pages: int, store_pages: int, page_tokens: int) -> None:
        self.device = Tier(device_pages)
        self.store = Tier(store_pages)
        self.page_tokens = page_tokens

    def match(self, request: EngineRequest) -> tuple[Held | None, int, int]:
        """The end of what the device has of its prompt, how deep that is, and how deep it could be used."""
        # The last token is always computed: its output is what the request is for.
        usable = (request.prompt_tokens + request.emitted - 1) // self.page_tokens
        if usable > request.end_pages:
            usable = request.end_pages
        tip, depth = self.device.find(request.branch, usable)
        return tip, depth, usable

    def load(self, request: EngineRequest, tip: Held | None, depth: int, usable: int) -> int:
        """It starts from the locked (tip, depth) and what the store has behind it, up to `usable`.

        Returns the tokens to load; their pages are taken.
        """
        request.tip, request.tree_pages = tip, depth
        request.computed = depth * self.page_tokens
        if depth == usable:
            return 0
        stored, stored_depth = self.store.find(request.branch, usable)
        if stored is None or stored_depth <= depth or not self.device.take(stored_depth - depth):
            return 0
        self.store.mark(stored, stored_depth)
        tokens = (stored_depth - depth) * self.page_tokens
        request.computed += tokens
        return tokens

    def grow(self, request: EngineRequest, tokens: int) -> bool:
        """Pages for that many more tokens; False, changing nothing, when too many are in use.

        `computed` is at the end of a page then: only the last piece of a prompt ends within one.
        """
        return self.device.take(-(-tokens // self.page_tokens))

    def commit(self, request: EngineRequest) -> None:
        """What is computed joins the device's tree, page by whole page; what is new goes into the store."""
        whole = request.computed // self.page_tokens
        if whole > request.end_pages:
            whole = request.end_pages
        tree = request.tree_pages
        if whole > tree:
            request.tip, before = self.device.adopt(request.tip, tree, request.branch, whole)
            request.tree_pages = whole
            if before < whole:
                self.store.extend(request.branch, whole, before)

    def release(self, request: EngineRequest) -> None:
        """It is over, or waits again: its pages in the tree become idle, the others are free."""
        device = self.device
        if request.tip is not None:
            device.unlock(request.tip, request.tree_pages)
            request.tip = None
        device.give_back(-(-request.computed // self.page_tokens) - request.tree_pages)
        request.tree_pages = 0
