"""The residual stream behind every block of a model: read it in a forward pass, or put another one in its place."""

import contextlib

from plumbing.models import backbone_of


@contextlib.contextmanager
def reading(model, positions):
    """While this context lasts, every forward pass leaves the stream behind its blocks in the list that is given: for
    each block [N, D]. positions [N]: where to look, indices into the B*T positions of the batch."""
    streams = []

    def read(block, inputs, output):
        streams.append(hidden(output).flatten(0, 1)[positions])

    handles = [block.register_forward_hook(read) for block in backbone_of(model).layers]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replacing(model, k, positions, states):
    """While this context lasts, block k leaves states[i] in row i of a batch, at positions[i]: states [B, D], positions
    [B]. Everything above reads that."""

    def replace(block, inputs, output):
        stream = hidden(output).clone()
        rows = range(len(stream))
        stream[rows, positions] = states.to(stream.dtype)
        if isinstance(output, tuple):
            return (stream, *output[1:])
        return stream

    handle = backbone_of(model).layers[k].register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def hidden(output):
    """What a block adds up, [B, T, D]: of some versions of transformers the first of several outputs."""
    return output[0] if isinstance(output, tuple) else output
