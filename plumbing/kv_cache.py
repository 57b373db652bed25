"""Keys and values of the tokens read so far, in a cache that grows without being copied for every new token."""

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values of one block, [B, heads, T, head_dim], with columns in reserve behind them.

    Its parent copies all it holds for every new token. At thousands of tokens that costs more than attending to them.
    The reserve is an eighth of what is held plus 16 columns, as far as `room` tokens (rows times columns) allow.
    """

    def __init__(self, room):
        super().__init__()
        self.room = room

    def update(self, keys, values, *args, **kwargs):
        """Take in the keys and values [B, heads, T, head_dim] of T new tokens -> all that are held."""
        if not self.is_initialized:
            return super().update(keys, values)
        # First the keys, then the values: while one of them moves to larger memory, it exists twice.
        self.keys = append_columns(self.keys, keys, self.room)
        self.values = append_columns(self.values, values, self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keep these rows, in this order; a row may be kept several times."""
        self.keys = select_rows(self.keys, indices)
        self.values = select_rows(self.values, indices)


def append_columns(held, new, room):
    """torch.cat of both along the columns, without a copy of `held` where the memory behind it is large enough."""
    B, heads, T, D = held.shape
    end = T + new.shape[2]
    columns = held.stride(1) // D  # of a head, those in reserve included
    if columns < end:
        wanted = end + end // 8 + 16
        allowed = room // B
        larger = held.new_empty(B, heads, max(end, min(wanted, allowed)), D)
        larger[:, :, :T] = held
        held = larger[:, :, :T]
    both = held.as_strided((B, heads, end, D), held.stride())
    both[:, :, T:] = new
    return both


def select_rows(held, indices):
    """held[indices], with the columns in reserve, unless the rows become more: they would fill another reserve."""
    B, heads, T, D = held.shape
    columns = T
    if len(indices) <= B:
        columns = held.stride(1) // D
    with_reserve = held.as_strided((B, heads, columns, D), held.stride())
    return with_reserve.index_select(0, indices)[:, :, :T]


def growing_cache(model, room):
    """An empty cache for `model` that holds at most `room` tokens. Blocks with a cache of another kind keep theirs."""
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer(room)
    return cache
