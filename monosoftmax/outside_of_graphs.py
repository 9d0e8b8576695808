"""What ``torch.compile`` runs as it is, between its graphs.

Imported only while something is compiled: torch.compiler.disable loads Dynamo, which takes a second.
"""

from __future__ import annotations

import torch

from . import in_place, token_loss

total_and_losses = torch.compiler.disable(in_place.total_and_losses)  # type: ignore[no-untyped-call]
token_loss_of_head = torch.compiler.disable(token_loss.of_head)  # type: ignore[no-untyped-call]
