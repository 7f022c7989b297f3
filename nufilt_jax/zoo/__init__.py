"""Built-in checkpoints: small CLIP vision towers and the image tasks that they know."""

from nufilt_jax.zoo.draws import CLASS_NAMES as CLASS_NAMES
from nufilt_jax.zoo.draws import STUDY_TASKS as STUDY_TASKS
from nufilt_jax.zoo.draws import TASK_NAMES as TASK_NAMES
from nufilt_jax.zoo.draws import draw as draw
from nufilt_jax.zoo.families import FAMILIES as FAMILIES
from nufilt_jax.zoo.families import STUDY as STUDY
from nufilt_jax.zoo.families import TINY_FAMILY as TINY_FAMILY
from nufilt_jax.zoo.families import Family as Family
from nufilt_jax.zoo.store import TinyZoo as TinyZoo
from nufilt_jax.zoo.store import evaluation_tasks as evaluation_tasks
from nufilt_jax.zoo.store import family_folder as family_folder
from nufilt_jax.zoo.store import load_heads as load_heads
from nufilt_jax.zoo.store import load_params as load_params
from nufilt_jax.zoo.store import materialise as materialise
