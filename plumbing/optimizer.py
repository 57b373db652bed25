"""AdamW on fp32 master weights, whatever the dtype of the model."""

import math
from dataclasses import dataclass

import torch

from plumbing import distributed, sharding
from plumbing.errors import UserError

MOST_SKIPPED = 10  # gradients in a row that are not finite
LOOKED_AT = 1024  # weights of a tensor, at most about so many, that tell whether updates survive rounding


@dataclass
class Slot:
    """A parameter of the model with its fp32 master and the AdamW that updates this master."""

    name: str
    parameter: torch.nn.Parameter
    master: torch.Tensor
    adam: torch.optim.AdamW
    factor: float  # of the learning rate
    sample: slice  # every so many entries, in which `summary` looks for changes


class Optimizer:
    """AdamW (0.9, 0.999) on fp32 master weights.

    A bf16 weight keeps 8 bits: an update of 1e-6 on a weight of 0.02 rounds to nothing. So moments and a master copy
    are fp32, beside the weights or on --optimizer_device, and the model gets the rounded master after each step. A
    model that is fp32 there already is its own master. Where several processes share the work, each of them does all
    this with its shares of the weights, see sharding.py. Parameters are updated one by one, so that one fp32 gradient
    exists at a time. Those whose grad is None are not touched at all: no decay, no moments. Those that require no grad
    are not even known here.
    """

    def __init__(self, model, args, factors=None):
        """Reads args.learning_rate, weight_decay, max_grad_norm, optimizer_device. factors: of the learning rate, by
        the names of the parameters that have one other than 1."""
        factors = factors or {}
        self.max_grad_norm = args.max_grad_norm
        self.skipped_in_a_row = 0
        self.norms = []  # gradient norms since the last summary
        self.moved = []  # pairs since the last summary: weights that an update changed, weights that it should change
        self.slots = []
        for name, parameter in model.named_parameters():  # a tied matrix appears once
            if not parameter.requires_grad:
                continue
            factor = factors.get(name, 1.0)
            device = args.optimizer_device or parameter.device
            master = sharding.own_share(parameter.detach()).to(device, torch.float32)
            rate = args.learning_rate * factor
            adam = torch.optim.AdamW([master], lr=rate, weight_decay=args.weight_decay, fused=True)
            stride = 1 + parameter.numel() // LOOKED_AT
            sample = slice(-sharding.entries_before(parameter) % stride, None, stride)
            self.slots.append(Slot(name, parameter, master, adam, factor, sample))

    def step(self, learning_rate=None):
        """Clip, update, clear the gradients -> norm before clipping. learning_rate: from now on, to be multiplied by
        the factors; None: as before.

        A gradient that is not finite updates nothing; ten in a row raise UserError.
        """
        norm = self.gradient_norm()
        self.norms.append(norm)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
            for slot in self.slots:
                if slot.parameter.grad is not None:
                    self.update(slot, scale, learning_rate)
        else:
            self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            remedy = "lower --learning_rate, or try --dtype float32"
            raise UserError(f"{MOST_SKIPPED} non-finite gradients in a row; {remedy}")
        for slot in self.slots:
            slot.parameter.grad = None
            slot.master.grad = None
        return norm

    def gradient_norm(self):
        """The norm of all gradients together, a float; 0.0 without any."""
        norms = []
        for slot in self.slots:
            if slot.parameter.grad is not None:
                gradient = sharding.own_share(slot.parameter.grad)
                norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        if not norms:
            return 0.0
        device = norms[0].device
        norm = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms])).item()
        return math.hypot(*distributed.everybodys(norm))

    def update(self, slot, scale, learning_rate):
        """One AdamW step of one parameter with its gradient times `scale`."""
        master = slot.master
        group = slot.adam.param_groups[0]
        if learning_rate is not None:
            group["lr"] = learning_rate * slot.factor
        master.grad = sharding.own_share(slot.parameter.grad).to(master.device, torch.float32).mul_(scale)
        before = master.data.flatten()[slot.sample].clone()
        should_change = (master.grad.flatten()[slot.sample] != 0) & (group["lr"] > 0)
        slot.adam.step()
        changed = (master.data.flatten()[slot.sample] != before) & should_change
        self.moved.append(torch.stack([changed.sum(), should_change.sum()]))
        self.give_back(slot)
        slot.parameter.grad = None  # now, so that one fp32 gradient exists at a time
        master.grad = None

    def give_back(self, slot):
        """The model computes with the rounded master; nothing changes where the parameter is its own master."""
        sharding.own_share(slot.parameter.data).copy_(slot.master)

    def forget_moments(self):
        """AdamW begins anew: without moments and with step 1 of their bias correction."""
        for slot in self.slots:
            slot.adam.state.clear()

    def summary(self):
        """What happened since the last summary -> dict.

        grad_norm: mean norm before clipping. optimizer_steps: number of updates. skipped_steps: gradients that were not
        finite. updated_share: of the weights with a gradient, those whose update did not vanish in rounding.
        """
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        figures = dict(
            grad_norm=None,
            optimizer_steps=len(finite),
            skipped_steps=len(self.norms) - len(finite),
            updated_share=None,
        )
        if finite:
            figures["grad_norm"] = sum(finite) / len(finite)
        if self.moved:
            changed, should_change = distributed.summed(sum(self.moved)).tolist()
            if should_change:
                figures["updated_share"] = changed / should_change
        self.norms = []
        self.moved = []
        return figures

    def state_dict(self):
        """Masters and moments by parameter name, of several processes the shares of this one."""
        state = {}
        for slot in self.slots:
            state[slot.name] = dict(master=slot.master.data, adam=slot.adam.state_dict())
        return state

    def load_state_dict(self, state):
        """Restore what `state_dict` gave, and with it the parameters of the model."""
        for slot in self.slots:
            slot.master.data.copy_(state[slot.name]["master"])
            self.give_back(slot)
            slot.adam.load_state_dict(state[slot.name]["adam"])
