"""Evaluation: every sample of a split once over all ranks, all networks on the same images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdkd_dist import distributed
from bdkd_dist.data.loader import Batch
from bdkd_dist.engine.observer import SamplePredictions
from bdkd_dist.engine.pair import Pair
from bdkd_dist.engine.replay import Replayed
from bdkd_dist.metrics import CalibrationState, fit_temperature, fit_vector_scaling
from bdkd_dist.objectives.divergences import entropy, log_probabilities
from bdkd_dist.objectives.schedule import value

VECTOR_SCALING_CLASSES = 1000
"""Vector scaling is fitted for at most so many: its Newton step holds (2K)² numbers."""


@dataclass(frozen=True)
class Outputs:
    """This rank's share of a split, on the CPU."""

    indices: Tensor
    """(n,) int64 sample indices."""
    labels: Tensor
    """(n,) int64."""
    logits: dict[str, Tensor]
    """By network, (n, K) float32."""


class Evaluator:
    """Runs networks over splits.

    Args:
        pair: Knows how images are normalised, and the precision of training.
        networks: By name; may hold more than the pair's own (moving averages).
        num_classes: K.
        device: Where they are.
        beat: Told of every batch.
        precise: Run the networks in float32 as torch has it, whatever the precision of training.
        replayed: Run the networks as CUDA graphs.
    """

    def __init__(
        self,
        pair: Pair,
        networks: dict[str, nn.Module],
        num_classes: int,
        device: torch.device,
        beat: Callable[[], None] = lambda: None,
        precise: bool = True,
        replayed: bool = False,
    ):
        self.pair = pair
        self.networks = networks
        self.num_classes = num_classes
        self.device = device
        self.beat = beat
        self.precise = precise
        self.forward = Replayed(self._logits, device, "train.compile=true") if replayed else self._logits

    def diagnose(self, batches: Iterable[Batch]) -> tuple[dict[str, CalibrationState], dict[str, Tensor]]:
        """Return each network's accuracy and calibration, and its samples' entropies, over all ranks' batches.

        The entropies are (N,) in nats on the CPU, at the objective's ``entropy_temperature`` where it has one.
        """
        temperature = value(getattr(self.pair.objective, "entropy_temperature", 1.0))
        states = {name: CalibrationState(self.num_classes, device=self.device) for name in self.networks}
        entropies = {name: [torch.empty(0, device=self.device)] for name in self.networks}
        for batch, logits in self._forward(batches):
            on_device = batch.labels.to(self.device, non_blocking=True)
            for name, values in logits.items():
                states[name].update(values, on_device)
                entropies[name].append(entropy(log_probabilities(values, temperature)))
        for state in states.values():
            state.all_reduce()
        joined = {name: distributed.concatenate(torch.cat(parts)[None])[0].cpu() for name, parts in entropies.items()}
        return states, joined

    def outputs(self, batches: Iterable[Batch]) -> Outputs:
        """Return logits, labels and indices of this rank's batches."""
        indices, labels = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        logits = {name: [torch.empty(0, self.num_classes)] for name in self.networks}
        for batch, batch_logits in self._forward(batches):
            # Copies: what a loading process hands over keeps a file open for as long as it is held.
            indices.append(batch.indices.clone())
            labels.append(batch.labels.cpu().clone())
            for name, values in batch_logits.items():
                logits[name].append(values.cpu())
        joined = {name: torch.cat(parts) for name, parts in logits.items()}
        return Outputs(torch.cat(indices), torch.cat(labels), joined)

    @torch.inference_mode()
    def _forward(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Yield batches with the logits by network; the networks are in eval mode for the while."""
        # Under local batch norm ranks hold different running statistics: rank 0's are the ones that are kept.
        distributed.broadcast_(b for network in self.networks.values() for b in network.buffers())
        modes = {name: network.training for name, network in self.networks.items()}
        for network in self.networks.values():
            network.eval()
        try:
            for batch in batches:
                logits = self.forward(batch.images.to(self.device, non_blocking=True))
                yield batch, dict(zip(self.networks, logits, strict=True))
                self.beat()
        finally:
            for name, network in self.networks.items():
                network.train(modes[name])

    def _logits(self, images: Tensor) -> Tensor:
        """Return every network's logits, (number of networks, B, K) float32, for (B, H, W, 3) uint8 images."""
        pixels = self.pair.normalise(images)
        with nullcontext() if self.precise else self.pair.autocast(self.device):
            return torch.stack([network(pixels).float() for network in self.networks.values()])


def calibrated(
    validation: Outputs, test: Outputs, num_classes: int
) -> tuple[dict[str, dict[str, object]], dict[str, dict[str, CalibrationState]]]:
    """Return metrics of every network over all ranks: raw, and scaled as fitted on validation.

    Returns:
        ``{split: {network: {"raw": metrics, "temperature_scaled": metrics, "temperature": T, "vector_scaled": metrics,
        "intervals": {metric: (low, high)}}}}`` for the splits ``validation`` and ``test``, and the raw states,
        ``{split: {network: state}}``. The 95 % bootstrap intervals are of the raw metrics, on rank 0;
        ``vector_scaled`` is None for more than :data:`VECTOR_SCALING_CLASSES` classes.
    """
    results: dict[str, dict[str, object]] = {"validation": {}, "test": {}}
    raw_states: dict[str, dict[str, CalibrationState]] = {"validation": {}, "test": {}}
    for name in validation.logits:
        temperature = fit_temperature(validation.logits[name], validation.labels)
        vector = None
        if num_classes <= VECTOR_SCALING_CLASSES:
            vector = fit_vector_scaling(validation.logits[name], validation.labels)
        for split, outputs in (("validation", validation), ("test", test)):
            raw = _state(outputs.logits[name], outputs.labels, num_classes)
            scaled = _state(outputs.logits[name] / temperature, outputs.labels, num_classes)
            vector_scaled = None
            if vector is not None:
                vector_scaled = _state(vector.apply(outputs.logits[name]), outputs.labels, num_classes).compute()
            raw_states[split][name] = raw
            results[split][name] = {
                "raw": raw.compute(),
                "temperature_scaled": scaled.compute(),
                "temperature": temperature,
                "vector_scaled": vector_scaled,
                "intervals": raw.intervals() if distributed.rank() == 0 else {},
            }
    return results, raw_states


def predictions(outputs: Outputs) -> tuple[Tensor, Tensor, dict[str, SamplePredictions]] | None:
    """Return (indices, labels, predictions by network) of the whole split on rank 0, None elsewhere."""
    mine = {name: _predictions(logits, outputs.labels) for name, logits in outputs.logits.items()}
    parts = distributed.gather((outputs.indices, outputs.labels, mine))
    if not parts:
        return None
    joined = {
        name: SamplePredictions(
            *(
                torch.cat([getattr(part[2][name], field) for part in parts])
                for field in ("top_classes", "top_probabilities", "nll")
            )
        )
        for name in mine
    }
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), joined


def _predictions(logits: Tensor, labels: Tensor) -> SamplePredictions:
    logs = logits.double().log_softmax(1)
    top = logs.topk(min(5, logits.shape[1]), dim=1)
    nll = -logs.gather(1, labels[:, None]).squeeze(1)
    return SamplePredictions(top.indices, top.values.exp(), nll)


def _state(logits: Tensor, labels: Tensor, num_classes: int) -> CalibrationState:
    state = CalibrationState(num_classes)
    state.update(logits, labels)
    state.all_reduce()
    return state
