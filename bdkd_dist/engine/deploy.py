"""A network on its own, as torch.export writes it: bytes of pixels in, logits out, and no word of this package."""

import io

import torch
from torch import Tensor, nn

from bdkd_dist.config import Data
from bdkd_dist.engine.pair import normalised, pixel_statistics
from bdkd_dist.errors import UserError, first_line

DESCRIPTION = "classifier.json"
"""The extra file of an exported network that says what it is."""


class Deployed(nn.Module):
    """A network with the normalisation in front of it.

    Args:
        network: Takes normalised (B, 3, H, W) images and gives (B, K) logits.
        data: Says how images are normalised.
    """

    def __init__(self, network: nn.Module, data: Data):
        super().__init__()
        self.network = network
        for name, values in pixel_statistics(data.mean, data.std).items():
            self.register_buffer(name, values)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, K) float32 logits for (B, H, W, 3) uint8 RGB images."""
        return self.network(normalised(images, self.mean, self.std)).float()


def exported(network: nn.Module, data: Data, description: str) -> bytes:
    """Return the content of a ``.pt2`` file for any number of images of ``data.image_px``.

    Args:
        network: On the CPU; left in evaluation mode, without gradients.
        data: Says how large images are and how they are normalised.
        description: Text beside the program, in the extra file :data:`DESCRIPTION`.

    Raises:
        UserError: torch.export cannot follow the network.
    """
    examples = torch.zeros(2, data.image_px, data.image_px, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch")
    try:
        deployed = Deployed(network, data).eval().requires_grad_(False)
        program = torch.export.export(deployed, (examples,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of many kinds: whatever the network does with its own code
        raise UserError(
            f"torch.export cannot follow the network ({type(error).__name__}: {first_line(error)})"
        ) from error
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={DESCRIPTION: description})
    return content.getvalue()
