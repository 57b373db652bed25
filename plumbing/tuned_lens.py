"""The translators of a tuned lens (https://arxiv.org/abs/2303.08112), which lie beside the model that they belong to.

analyze_lens.py trains them and says what they show; whoever looks at a model may read them here.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.errors import UserError
from plumbing.models import backbone_of
from plumbing.options import EMBEDDED_MODEL


class TunedLens(torch.nn.Module):
    """An affine map x -> x + weight_k x + bias_k of the stream behind every block k of L but the last, in fp32.

    All are 0 at first, and then the lens is the usual logit lens. The last block has no map: what that block leaves is
    what the whole policy reads.
    """

    def __init__(self, L, D):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(L - 1, D, D))
        self.bias = torch.nn.Parameter(torch.zeros(L - 1, D))

    def translate(self, k, states):
        """The stream behind block k, [n, D], as the final norm would like to read it. k = -1, the embedding, and the
        last block have no map."""
        if not 0 <= k < len(self.weight):
            return states
        x = states.float()
        translated = x + x @ self.weight[k].T + self.bias[k]
        return translated.to(states.dtype)


def new_lens(model):
    """A lens for a model, before its training, on the model's device."""
    L = len(backbone_of(model).layers)
    return TunedLens(L, model.config.hidden_size).to(model.device)


def fingerprint(model):
    """A hash of all weights, which no other model has: not the same one after a training step, or in another dtype."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights = parameter.detach().cpu().flatten()
        found.update(weights.view(torch.uint8).numpy())  # numpy has no bf16
    return found.hexdigest()


def lens_folder(path):
    """Where the lens of a model lies: in its folder; of one from the hub, below runs/."""
    if path == "embedded":
        return EMBEDDED_MODEL / "tuned_lens"
    if Path(path).is_dir():
        return Path(path) / "tuned_lens"
    return Path("runs/tuned_lens") / path.replace("/", "--")


def save_lens(lens, folder, model, facts):
    """Write lens.safetensors whole or not at all. facts: what it was trained on, a dict for JSON."""
    described = dict(fingerprint=fingerprint(model), facts=json.dumps(facts))
    tensors = {name: tensor.contiguous() for name, tensor in lens.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "lens.tmp"
    save_file(tensors, temporary, described)
    temporary.replace(folder / "lens.safetensors")


def load_lens(folder, model):
    """(lens, facts) of `save_lens`; (None, {}) if there is none. Raises UserError for a lens of other weights."""
    file = folder / "lens.safetensors"
    if not file.is_file():
        return None, {}
    lens = new_lens(model)
    try:
        with safe_open(file, "pt") as saved:
            described = saved.metadata() or {}
            if described.get("fingerprint") != fingerprint(model):
                raise UserError(f"{file}: is the lens of other weights; analyze_lens.py --overwrite trains it again")
            lens.load_state_dict({name: saved.get_tensor(name) for name in saved.keys()})
            facts = json.loads(described["facts"])
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); analyze_lens.py --overwrite trains it again")
    return lens, facts
