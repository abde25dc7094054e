"""Checks of the model: whether attacks can see what it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nas.activations.lossy import BACKWARDS, lossy_maps
from nas.activations.sparta import SATURATED, openness
from nas.attacks.bpda import Bpda
from nas.attacks.gradient import input_gradient
from nas.attacks.losses import LOSSES
from nas.evaluation.expectation import answers_at_random
from nas.evaluation.suspicion import Case, Check, Verdict, grade, share
from nas.model_state import crafting
from nas.prediction import begin, networks_in

DIRECTIONS = 16
"""Along which gradients are compared with differences."""


def deterministic(case: Case) -> Check:
    """A random model has to be attacked and judged by averages over its randomness."""
    with torch.no_grad():
        first, second = case.model(case.x), case.model(case.x)
    if torch.equal(first, second):
        return Check("deterministic model", "pass", "two passes give the same logits")
    if not answers_at_random(case.model):
        return Check("deterministic model", "fail", "two passes differ: average over the randomness")
    changed = share(first.argmax(1) != second.argmax(1))
    detail = f"two predictions, each a mean over the randomness, give {changed:.1%} of the images different classes"
    return Check("deterministic model", grade(changed, 0.02, 0.1), detail)


def logits(case: Case) -> Check:
    """A softmax inside the model flattens the losses of the attacks."""
    with torch.no_grad():
        outputs = case.model(case.x)
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    probabilities = inside and bool(((outputs.sum(1) - 1).abs() < 1e-4).all())
    largest = float(outputs.abs().max())
    if probabilities:
        return Check("logits", "fail", "the outputs are probabilities: attacks need the logits before the softmax")
    return Check("logits", "pass", f"outputs are logits, at most {largest:.3g} in size")


def eval_mode(case: Case) -> Check:
    """Layers that learn or draw while the model is judged; samples that depend on their batch."""
    kinds = (_BatchNorm, _DropoutNd, nn.modules.instancenorm._InstanceNorm)
    learning = [name for name, module in case.model.named_modules() if isinstance(module, kinds) and module.training]
    if learning:
        return Check("eval mode", "fail", f"'{learning[0]}' is in train mode although the model was put in eval mode")
    few, difference = case.x[:8], 0.0
    # The networks of an ensemble, without its noise.
    for network in networks_in(case.model).values():
        with torch.no_grad():
            together, again = network(few), network(few)
            alone = torch.cat([network(image) for image in few.split(1)])
        if not torch.equal(together, again):
            return Check("eval mode", "warn", "whether a sample depends on its batch cannot be seen in a random model")
        difference = max(difference, float((together - alone).abs().amax() / together.abs().amax().clamp_min(1e-12)))
    detail = f"logits of an image alone and in a batch differ by {difference:.1e} of the largest"
    return Check("eval mode", grade(difference, 1e-3, 1e-2), detail)


def gradients_there(case: Case) -> Check:
    """Gradients that are zero, infinite or no numbers lead nowhere."""
    with crafting(case.model):
        gradient, _, _ = input_gradient(case.model, case.x, case.y, "margin", None)
    flat = gradient.flatten(1)
    useless = share((flat.abs().amax(1) == 0) | ~flat.isfinite().all(1))
    return Check("zero gradients", grade(useless, 0.01, 0.1), f"{useless:.1%} of the samples have no margin gradient")


def gradients_true(case: Case) -> Check:
    """Along random directions, gradients should foretell how the margin changes."""
    step = case.threat_model.epsilon / 8
    randomness = case.generator("directions")

    def margins(images: Tensor) -> Tensor:
        begin(case.model)  # with the noise that the gradient was taken at, if any
        with torch.no_grad():
            return LOSSES["margin"](case.model(images), case.y, None)

    with crafting(case.model):
        begin(case.model)
        gradient, _, _ = input_gradient(case.model, case.x, case.y, "margin", None)
        foretold, found = [], []
        for _ in range(DIRECTIONS):
            noise = torch.randn(case.x.shape, generator=randomness, device=case.x.device, dtype=case.x.dtype)
            direction = case.threat_model.geometry.steepest(noise)
            foretold.append((gradient * direction).flatten(1).sum(1))
            ahead, behind = margins(case.x + step * direction), margins(case.x - step * direction)
            found.append((ahead - behind) / (2 * step))
    a, b = torch.stack(foretold).double(), torch.stack(found).double()
    cosine = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-30)
    median = float(cosine.nan_to_num(0.0).median())
    return Check(
        "gradients are true",
        grade(1 - median, 0.2, 0.5),
        f"gradients and differences along {DIRECTIONS} random directions agree by a cosine of {median:.2f} (median)",
    )


def gates_open(case: Case) -> list[Check]:
    """Gates of activations that are all open or all shut pass no gradient to what they look at."""
    with torch.no_grad(), openness(case.model) as found:
        case.model(case.x)
    if not found:
        return []
    name, least = min(found.items(), key=lambda item: item[1])
    verdict: Verdict = "pass" if least >= SATURATED else "fail"
    return [Check("open gates", verdict, f"the mean of A (1 - A) is {least:.1e} at '{name}', the least; 0.25 at most")]


def lossy_layers(case: Case) -> list[Check]:
    """Activations that lose information mask gradients; at best nobody has found the way round yet."""
    maps = lossy_maps(case.model)
    if not maps:
        return []
    rows = case.robust.nonzero().squeeze(1)
    broken = torch.zeros(len(rows), dtype=torch.bool, device=case.x.device)
    x, y = case.x[rows], case.y[rows]
    for through in BACKWARDS if len(rows) else ():
        attack = Bpda(case.threat_model, steps=20, through=through)
        broken |= ~case.answers(attack(case.model, x, y, generator=case.generator(f"lossy {through}")), rows)
    fell = float(broken.sum()) / len(case.x)
    detail = (
        f"{len(maps)} lossy activations mask gradients; {fell:.1%} of the samples withstood the attacks but fall to "
        f"PGD-20 through one of {', '.join(BACKWARDS)}"
    )
    # Never "pass": what no surrogate gradient found may still be there.
    return [Check("lossy activations", "warn" if fell <= 0.02 else "fail", detail)]


MODEL_CHECKS = (deterministic, logits, eval_mode, gradients_there, gradients_true, gates_open, lossy_layers)
