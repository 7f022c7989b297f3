"""Model folders read and written: the only code that touches weights, on disk or on the Hub."""

from nufilt_jax.checkpoints.added import read_added as read_added
from nufilt_jax.checkpoints.added import write_added as write_added
from nufilt_jax.checkpoints.flax_trees import from_flax as from_flax
from nufilt_jax.checkpoints.flax_trees import to_flax as to_flax
from nufilt_jax.checkpoints.hub import parse_source as parse_source
from nufilt_jax.checkpoints.partners import fit as fit
from nufilt_jax.checkpoints.peft.adapted import AdaptedCheckpoint as AdaptedCheckpoint
from nufilt_jax.checkpoints.peft.reader import open_task as open_task
from nufilt_jax.checkpoints.quantised import quantised_problems as quantised_problems
from nufilt_jax.checkpoints.reader import Checkpoint as Checkpoint
from nufilt_jax.checkpoints.reader import open_checkpoint as open_checkpoint
from nufilt_jax.checkpoints.saving import load as load
from nufilt_jax.checkpoints.saving import save as save
from nufilt_jax.checkpoints.survey import Findings as Findings
from nufilt_jax.checkpoints.survey import survey_file as survey_file
from nufilt_jax.checkpoints.tensors import TensorInfo as TensorInfo
from nufilt_jax.checkpoints.writer import write_checkpoint as write_checkpoint
