"""Which blocks are trained, and how fast: --train_blocks, --lr_below, and what phase one of bottom-up training
moves."""

import math
import random
import re

from plumbing.errors import UserError
from plumbing.models import backbone_of


def train_only(model, train_blocks):
    """Leave the gradient to some blocks, 'a:b' as in a slice, and to nothing else of the model: neither embedding nor
    head, final norm or other blocks. None leaves it to all. Raises UserError."""
    if train_blocks is None:
        return
    blocks = backbone_of(model).layers
    first, end = block_range(train_blocks, len(blocks))
    model.requires_grad_(False)
    blocks[first:end].requires_grad_(True)
    trained = sum(parameter.numel() for parameter in blocks[first:end].parameters())
    print(f"--train_blocks {train_blocks}: {trained:,} of {model.num_parameters():,} weights are trained")


def block_range(train_blocks, n):
    """'a:b' -> (a, b), numbers of the first trained block of n and of the first one behind. Raises UserError."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", train_blocks)
    if found:
        first = int(found[1])
        end = int(found[2])
        if first < end <= n:
            return first, end
    remedy = f"write A:B for blocks A to B - 1, 0:{n} for all of them"
    raise UserError(f"--train_blocks {train_blocks}: this model has blocks 0 to {n - 1}; {remedy}")


def rate_factors(model, lr_below):
    """'k:factor' -> what multiplies the learning rate, by parameter name: the factor for the embedding, and with it for
    a head that is tied to it, and for all blocks below k. None: {}. Raises UserError."""
    if lr_below is None:
        return {}
    backbone = backbone_of(model)
    k, factor = bound_and_factor(lr_below, len(backbone.layers))
    below = {*backbone.embed_tokens.parameters(), *backbone.layers[:k].parameters()}
    return {name: factor for name, parameter in model.named_parameters() if parameter in below}


def bound_and_factor(lr_below, n):
    """'k:factor' -> (k, factor), for a model of n blocks. Raises UserError."""
    found = re.fullmatch(r"(\d{1,9}):([\d.e+-]+)", lr_below)
    if found:
        try:
            factor = float(found[2])
        except ValueError:
            factor = math.nan
        if int(found[1]) <= n and 0 <= factor < math.inf:
            return int(found[1]), factor
    remedy = f"write K:FACTOR for the blocks below K, K from 0 to {n} and FACTOR at least 0, like 1:0.1"
    raise UserError(f"--lr_below {lr_below}: this model has blocks 0 to {n - 1}; {remedy}")


def block_number(model, layer, args):
    """The block of --internal_layer, a number, one drawn by --seed for 'random'. Raises UserError if there is none of
    this number, or if phase one would train nothing: its gradient ends at this block, --train_blocks begins above."""
    n = len(backbone_of(model).layers)
    if layer == "random":
        layer = random.Random(args.seed).randrange(n)
    if str(layer) not in [str(k) for k in range(n)]:
        choice = "choose one, 'auto' or 'random'"
        raise UserError(f"--internal_layer {layer}: this model has blocks 0 to {n - 1}; {choice}")
    layer = int(layer)
    if args.train_blocks and args.internal_steps:
        first, _ = block_range(args.train_blocks, n)
        if first > layer:
            remedy = f"begin at {layer} or below, or take --internal_steps 0"
            raise UserError(f"--train_blocks {args.train_blocks}: phase one trains no block above {layer}; {remedy}")
    return layer


def drop_gradients_above(model, layer, norm):
    """Forget the gradients of what the policy of block `layer` does not depend on, so that the optimizer leaves it as
    it is: the blocks above, and the final norm unless the policy is the normed one (`norm`)."""
    backbone = backbone_of(model)
    above = list(backbone.layers[layer + 1 :])
    if not norm:
        above.append(backbone.norm)
    for part in above:
        for parameter in part.parameters():
            parameter.grad = None
