"""What a rank imports, imported: for the processes that ranks are forked from. Leaves no thread behind."""

import torch._dynamo  # noqa: F401  (the first optimizer would import it, in four seconds)

import pretrain.cli
import pretrain.engine.zero
import pretrain.train

pretrain.engine.zero._import()
