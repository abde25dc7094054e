"""ARLST: separable linear layers, trained to be sparse and well conditioned."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nas.compression.condition_number import CONDITION_TERMS, SPARSITY_TERMS, condition_number, rank
from nas.compression.layers import Layer, deployed_layers, exchanged, kept_dense
from nas.compression.plan import LayerPlan, Plan
from nas.compression.separable_linear import (
    Modes,
    SeparableLinear,
    SeparablePointwise,
    Separation,
    nearest_kronecker,
    separations,
)
from nas.errors import InputError
from nas.objective import Batch, Gradients, Metrics, Objective, Setting, State, gradients_of, kept_by
from search_spaces.layers import Normalise


@dataclass(frozen=True)
class Arlst:
    """ARLST: linear layers become Kronecker products of small matrices, trained sparse and well conditioned.

    After Wei et al., "Learning Extremely Lightweight and Robust Model with Differentiable Constraints on Sparsity and
    Condition Number", ECCV 2022 (arXiv 2112.13551). A reconstruction: of the paper only the abstracts could be read.
    From them are the separable structure, the two penalties and that both join adversarial training; the form of the
    penalties, their weights, and how modes are chosen are inferred. No published number is promised.

    A layer [m, n] becomes sum_t A_1^t (x) ... (x) A_d^t + b (``separable_linear``). Fine-tuning minimises what the
    network was trained by

        + sparsity * sum_k S(A_k) + conditioning * sum_k R(A_k)        (``condition_number``),

    both weights rising linearly over the first share ``warmup`` of it. As kappa(A (x) B) = kappa(A) kappa(B), where
    both are wide or both are tall, the condition of the factors is that of the layer.

    keep: share of the weights of the competing layers that stays at most; biases stay. All layers get the same share
    as nearly as their sizes have it. terms: most terms of a layer; 1 is the paper's form and the fastest. modes: most
    factors of a term, where the input is no feature map whose axes the factors follow. start: "dense", the factors
    nearest to the layer, of the modes for which they are nearest, scaled to its norm; "nearest", the same as they are,
    for use without fine-tuning; "scratch", random factors of the largest modes. The scale is not in the paper: trained
    layers have flat spectra, the nearest product is a few per cent of them, and training does not bring it back.
    classifier: whether the last linear layer competes, too. convolutions: whether 1x1 convolutions do, over their
    channels (an extension, not in the paper).
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.1
    terms: int = 1
    modes: int = 2
    start: Literal["dense", "nearest", "scratch"] = "dense"
    sparsity: float = 1e-4
    sparsity_term: Literal["log", "l1"] = "log"
    conditioning: float = 1e-2
    condition_term: Literal["amgm", "gap", "tight-frame", "exact"] = "amgm"
    warmup: float = 0.1
    classifier: bool = False
    convolutions: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, not {self.keep}")
        if not 1 <= self.terms <= 64:
            raise InputError(f"terms of a separable layer must be from 1 to 64, not {self.terms}")
        if not 2 <= self.modes <= 4:
            raise InputError(f"modes of a separable layer must be from 2 to 4, not {self.modes}")
        if self.start not in _STARTS:
            raise InputError(f"start must be {' or '.join(_STARTS)}, not '{self.start}'")
        if self.sparsity_term not in SPARSITY_TERMS:
            raise InputError(f"sparsity_term must be {' or '.join(SPARSITY_TERMS)}, not '{self.sparsity_term}'")
        if self.condition_term not in CONDITION_TERMS:
            raise InputError(f"condition_term must be {' or '.join(CONDITION_TERMS)}, not '{self.condition_term}'")
        for name in ("sparsity", "conditioning"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is the weight of a penalty, at least 0, not {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is a share of the fine-tuning from 0 to 1, not {self.warmup}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which layers become separable, and along which modes; weights do not enter but for how near they come."""
        layers = deployed_layers(model)
        shapes = feature_maps(model, None if setting is None else setting.data.input_shape)
        reasons, choices = self._skipped(layers), {}
        for name, layer in layers.items():
            if name not in reasons:
                m, n = layer.weight.shape[:2]
                choices[name] = self._choices(layer, shapes.get(name))
                if not choices[name]:
                    del choices[name]
                    reasons[name] = f"no separable layer is smaller: {n} -> {m} features"
        if not choices:
            hint = "" if self.classifier and self.convolutions else "; classifier and convolutions = true allow more"
            told = "; ".join(f"'{name}': {reason}" for name, reason in [*reasons.items()][-3:])
            raise InputError(f"this network has no layer that ARLST may replace ({told}){hint}")
        chosen = self._within_budget({name: layers[name].weight.numel() for name in choices}, choices)
        note = _share_note(model, [layers[name] for name in choices])
        plans = []
        for name, layer in layers.items():
            separation = chosen.get(name)
            if name in reasons:
                plans.append(LayerPlan(name, "skipped", reasons[name], {}))
            elif separation is None:
                plans.append(LayerPlan(name, "skipped", "kept whole: the budget allows it", {}))
            else:
                reason = f"{separation}: {separation.weights} of {layer.weight.numel()} weights{note}"
                data = {
                    "in_modes": list(separation.in_modes),
                    "out_modes": list(separation.out_modes),
                    "terms": separation.terms,
                    "start": self.start,
                    "seed": 0 if setting is None else setting.seed,
                }
                plans.append(LayerPlan(name, "replaced", reason, data))
        return Plan("arlst", tuple(plans))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with separable layers, of factors from its weights where ``fit`` and plan say so."""
        compressed = copy.deepcopy(model)
        layers = deployed_layers(compressed)
        for index, layer_plan in enumerate(plan.layers):
            layer = layers.get(layer_plan.name)
            if layer is None:
                raise InputError(f"the plan is for another network: there is no layer '{layer_plan.name}'")
            if layer_plan.action == "replaced":
                exchanged(compressed, layer_plan.name, _separable(layer_plan, layer, index, fit))
        return compressed

    def recovery(self, objective: Objective, parent: nn.Module) -> Objective:
        """``objective`` with both penalties."""
        del parent
        return with_penalties(objective, self)

    def _skipped(self, layers: Mapping[str, Layer]) -> dict[str, str]:
        """Layers that do not compete, with the reason."""
        custom = kept_dense(layers)
        reasons = {}
        for name, layer in layers.items():
            obstacle = _obstacle(layer)
            if custom.get(name) == "classifier" and not self.classifier:
                reasons[name] = "classifier"
            elif obstacle:
                reasons[name] = obstacle
            elif isinstance(layer, nn.Conv2d) and not self.convolutions:
                reasons[name] = "1x1 convolution: convolutions = false"
            elif custom.get(name) == "first convolution":
                reasons[name] = "first convolution"
        return reasons

    def _choices(self, layer: Layer, shape: Modes | None) -> dict[int, Separation]:
        """What may stand for ``layer``, by its number of weights, fewest first, each better than all before."""
        m, n = layer.weight.shape[:2]
        candidates = separations(m, n, shape=shape, modes=self.modes, terms=self.terms)
        if self.start == "scratch":
            largest: dict[int, Separation] = {}
            for separation in candidates:
                largest.setdefault(separation.weights, separation)
            return largest
        weight = layer.weight.detach().view(m, n)
        total = float(weight.double().square().sum())
        errors: dict[tuple[Modes, Modes], list[float]] = {}
        best, choices = math.inf, {}
        for separation in candidates:
            modes = separation.in_modes, separation.out_modes
            if modes not in errors:
                most = Separation(*modes, min(self.terms, separation.sufficient_terms))
                _, norms = nearest_kronecker(weight, most, vectors=False)
                errors[modes] = [total - float(part) for part in norms.double().square().cumsum(0)]
            error = errors[modes][min(separation.terms, len(errors[modes])) - 1]
            if error < best - 1e-9 * total:
                best = error
                choices[separation.weights] = separation
        return choices

    def _within_budget(
        self, sizes: Mapping[str, int], choices: Mapping[str, Mapping[int, Separation]]
    ) -> dict[str, Separation | None]:
        """The structure of each layer at the largest common share for which all together stay within ``keep``.

        A layer takes the best choice within that share of its weights, or its smallest one; None: it stays whole.
        """
        levels: dict[str, list[tuple[float, int, Separation | None]]] = {
            name: [*((weights / size, weights, choice) for weights, choice in choices[name].items()), (1.0, size, None)]
            for name, size in sizes.items()
        }
        budget = self.keep * sum(sizes.values())

        def at(share: float) -> dict[str, tuple[float, int, Separation | None]]:
            return {
                name: max((level for level in own if level[0] <= share), key=lambda level: level[1], default=own[0])
                for name, own in levels.items()
            }

        for share in sorted({level[0] for own in levels.values() for level in own}, reverse=True):
            found = at(share)
            if sum(weights for _, weights, _ in found.values()) <= budget:
                return {name: separation for name, (_, _, separation) in found.items()}
        least = sum(own[0][1] for own in levels.values()) / sum(sizes.values())
        more = "" if self.modes == 4 else f", with {self.modes} modes; more modes allow less"
        raise InputError(
            f"keep = {self.keep} is not possible: the smallest separable layers of this network have "
            f"{math.ceil(least * 1e6) / 1e6:.6f} of the weights{more}"
        )


@dataclass(frozen=True)
class Penalised:
    """``objective`` plus the penalties of ``method`` on the factors of all separable layers, where they are now."""

    objective: Objective
    method: Arlst

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The loss with the penalties added; both without their weights among the metrics."""
        loss, metrics = self.objective(model, batch, state)
        penalty, values = penalties(model, self.method, state.progress)
        return (loss if penalty is None else loss + penalty.to(loss.dtype)), {**metrics, **values}


@dataclass(frozen=True)
class PenalisedGradients(Penalised):
    """``Penalised`` around an objective with gradients of its own, to which those of the penalties are added."""

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]:
        """Gradients of the objective, and of the penalties at the weights as they are."""
        loss, gradients, metrics = gradients_of(self.objective, model, batch, state, parameters)
        penalty, values = penalties(model, self.method, state.progress)
        if penalty is None or not penalty.requires_grad:
            return loss, gradients, {**metrics, **values}
        more = torch.autograd.grad(penalty.to(loss.dtype), [*parameters], allow_unused=True)
        summed: list[Tensor | None] = [
            a if b is None else b if a is None else a + b for a, b in zip(gradients, more, strict=True)
        ]
        return loss + penalty.detach().to(loss.dtype), summed, {**metrics, **values}


def with_penalties(objective: Objective, method: Arlst) -> Objective:
    """``objective`` with the penalties of ``method``, whether it has gradients of its own or a loss."""
    kind = Penalised if kept_by(objective, Gradients) is None else PenalisedGradients
    return kind(objective, method)


def penalties(model: nn.Module, method: Arlst, progress: float) -> tuple[Tensor | None, Metrics]:
    """What is added to the loss after the share ``progress`` of the training, and both sums without their weights.

    None where nothing is: no separable layer, or both weights 0. Masked factors count as they are used.
    """
    weights = [factor.weight for _, _, _, factor in separable_factors(model)]
    total, values = None, {}
    warm = 1.0 if method.warmup == 0 else min(1.0, progress / method.warmup)
    for name, weight, term in (
        ("sparsity", method.sparsity, SPARSITY_TERMS[method.sparsity_term]),
        ("conditioning", method.conditioning, CONDITION_TERMS[method.condition_term]),
    ):
        if weight and weights:
            value = torch.stack([term(own) for own in weights]).sum()
            values[name] = value.detach()
            total = warm * weight * value if total is None else total + warm * weight * value
    return total, values


@dataclass(frozen=True)
class Factor:
    """A factor of a separable layer as it is, masks included.

    shape: (m_k, n_k);  nonzeros: entries that are not 0;  empty_rows, empty_columns: those of zeros alone: features
    that the layer cannot give or does not see;  rank, condition_number: true ones, infinite for a singular factor.
    """

    layer: str
    term: int
    index: int
    shape: tuple[int, int]
    nonzeros: int
    empty_rows: int
    empty_columns: int
    rank: int
    condition_number: float


def factor_report(model: nn.Module) -> list[Factor]:
    """Rank, condition number and non-zeros of every factor in ``model``.

    A surrogate of the condition number is finite for a singular factor, and a mask may empty a row of one, which
    empties as many rows of the product as the other factors have: neither shows in a loss.
    """
    report = []
    for layer, term, index, factor in separable_factors(model):
        weight = factor.weight.detach()
        used = weight != 0
        report.append(
            Factor(
                layer,
                term,
                index,
                (weight.shape[0], weight.shape[1]),
                int(used.sum()),
                int((~used.any(1)).sum()),
                int((~used.any(0)).sum()),
                rank(weight),
                condition_number(weight),
            )
        )
    return report


def separable_factors(model: nn.Module) -> Iterator[tuple[str, int, int, nn.Linear]]:
    """Name of the layer, term, index and factor, of all separable layers of ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, SeparableLinear):
            for term, factors in enumerate(module.factors()):
                for index, factor in enumerate(factors):
                    yield name, term, index, factor


def feature_maps(model: nn.Module, image: tuple[int, int, int] | None = None) -> dict[str, Modes]:
    """The shape (C, H, W) of what each linear layer sees flattened, where the network's structure tells.

    That of the image, where nothing comes before (its channels are those that are normalised, unless ``image`` is
    given), or of the last map before it: its channels are those of the convolution, its size that of an adaptive
    pool, or square. Only the order of the modules is looked at: a wrong guess costs accuracy, never correctness.
    """
    found: dict[str, Modes] = {}
    channels = 0 if image is None else image[0]
    sizes: tuple[int | None, ...] = () if image is None else image[1:]
    for name, module in model.named_modules():
        if isinstance(module, Normalise) and not channels:
            channels = module.mean.numel()
        elif isinstance(module, nn.Conv2d):
            channels, sizes = module.out_channels, ()
        elif isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            size = module.output_size
            sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
        elif isinstance(module, nn.Linear):
            if channels and module.in_features % channels == 0:
                pixels = module.in_features // channels
                side = math.isqrt(pixels)
                known = [size for size in sizes if size is not None]
                if len(known) == 2 and math.prod(known) == pixels > 1:
                    found[name] = (channels, *known)
                elif side**2 == pixels > 1:
                    found[name] = (channels, side, side)
            channels, sizes = 0, ()
    return found


def materialised(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """A copy of ``model`` with ordinary linear layers of the same function for the separable ones (all, or ``names``).

    For export where the dense product is the quicker one. There are as many parameters as before compression.
    """
    dense = copy.deepcopy(model)
    separable = {name: module for name, module in dense.named_modules() if isinstance(module, SeparableLinear)}
    for name, module in separable.items():
        if names is None or name in names:
            weight = module.weight.detach()
            linear = nn.utils.skip_init(
                nn.Linear, module.in_features, module.out_features, bias=module.bias is not None,
                dtype=weight.dtype, device=weight.device,
            )  # fmt: skip
            with torch.no_grad():
                linear.weight.copy_(weight)
                if module.bias is not None:
                    linear.bias.copy_(module.bias)
            exchanged(dense, name, linear.train(module.training))
    return dense


def quicker_dense(model: nn.Module, x: Tensor, repeats: int = 20) -> list[str]:
    """Names of the separable layers that an ordinary linear one would outrun, measured on this machine.

    x: images as they will come, as their number decides. Each layer is timed on what it then sees, in the mode that
    the model is in, without gradients.
    """
    seen: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SeparableLinear)}
    handles = [layer.register_forward_pre_hook(partial(_remember, seen, name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, features in seen.items():
        rivals = layers[name], materialised(nn.Sequential(layers[name]))[0]  # type: ignore[index]
        times = [_seconds(rival, features, repeats) for rival in rivals]
        if times[1] < times[0]:
            found.append(name)
    return found


def _remember(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    del module
    seen[name] = inputs[0]


def _seconds(layer: nn.Module, x: Tensor, repeats: int) -> float:
    # Not above: this import looks for a CUDA toolkit, and warns on standard error where one is half there.
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=threads)
    with torch.no_grad():
        timer.timeit(3)
        return min(timer.timeit(repeats).mean for _ in range(5))


_STARTS = ("dense", "nearest", "scratch")


def _obstacle(layer: Layer) -> str:
    """Why ``layer`` cannot be separable; empty where it can."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "part of an attention that uses its weight and never calls it"
    if isinstance(layer, nn.Linear):
        return ""
    if layer.kernel_size != (1, 1):
        return "convolution larger than 1x1"
    if layer.groups != 1:
        return "grouped convolution"
    return "padded 1x1 convolution" if layer.padding not in ((0, 0), "valid", "same") else ""


def _share_note(model: nn.Module, layers: Sequence[Layer]) -> str:
    """A warning where the competing layers are the smaller part of the network."""
    everything = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary."))
    share = sum(layer.weight.numel() for layer in layers) / everything
    return f" (all such layers hold only {share:.1%} of the network's parameters)" if share < 0.5 else ""


def _separable(plan: LayerPlan, layer: Layer, index: int, fit: bool) -> nn.Module:
    """What takes the place of ``layer``."""
    obstacle = _obstacle(layer)
    if obstacle:
        raise InputError(f"the plan is for another network: '{plan.name}' cannot be separable ({obstacle})")
    m, n = layer.weight.shape[:2]
    separation, start, seed = _checked(plan, m, n)
    linear = SeparableLinear(
        separation,
        bias=layer.bias is not None,
        dtype=layer.weight.dtype,
        device=layer.weight.device,
        generator=torch.Generator().manual_seed((seed + index) % 2**63),
    )
    if fit and start != "scratch":
        weight = layer.weight.detach().view(m, n)
        terms, norms = nearest_kronecker(weight, separation)
        captured = float(norms.norm())
        scale = float(weight.norm()) / captured if start == "dense" and captured > 0 else 1.0
        share = scale ** (1 / len(separation.in_modes))
        linear.set_factors([[factor * share for factor in factors] for factors in terms])
        if linear.bias is not None and layer.bias is not None:
            with torch.no_grad():
                linear.bias.copy_(layer.bias)
    trained = {name.rpartition(".")[2]: parameter.requires_grad for name, parameter in layer.named_parameters()}
    for name, parameter in linear.named_parameters():
        # The weight of a layer that is masked is called "original".
        parameter.requires_grad_(trained["bias" if name == "bias" else "weight" if "weight" in trained else "original"])
    whole: nn.Module = linear
    if isinstance(layer, nn.Conv2d):
        whole = SeparablePointwise(linear, (layer.stride[0], layer.stride[-1]))
    return whole.train(layer.training)


def _checked(plan: LayerPlan, m: int, n: int) -> tuple[Separation, str, int]:
    """Structure, start and seed in the data of ``plan``, for an [m, n] matrix."""
    data: Mapping[str, Any] = plan.data
    modes = []
    for name, features in (("in_modes", n), ("out_modes", m)):
        own = data.get(name)
        if not isinstance(own, list) or not 1 <= len(own) <= 8 or not all(type(k) is int and k >= 1 for k in own):
            raise InputError(f"the plan's {name} of layer '{plan.name}' are damaged")
        if math.prod(own) != features:
            raise InputError(
                f"the plan is for another network: '{plan.name}' has {features} features, which its {name} do not give"
            )
        modes.append(tuple(own))
    terms, start, seed = data.get("terms"), data.get("start"), data.get("seed")
    if len(modes[0]) != len(modes[1]):
        raise InputError(f"the plan's modes of layer '{plan.name}' are damaged: as many must go out as come in")
    most = Separation(modes[0], modes[1]).sufficient_terms
    if type(terms) is not int or not 1 <= terms <= most:
        raise InputError(f"the plan's terms of layer '{plan.name}' must be from 1 to {most}")
    if start not in _STARTS or type(seed) is not int or seed < 0:
        raise InputError(f"the plan's start or seed of layer '{plan.name}' is damaged")
    return Separation(modes[0], modes[1], terms), start, seed


PLUGIN = Arlst
