"""Tasks, zero-shot heads, accuracies and the scores of a sequence of merges."""

from nufilt_jax.evaluation.clip.zero_shot import class_logits as class_logits
from nufilt_jax.evaluation.clip.zero_shot import normalise_head as normalise_head
from nufilt_jax.evaluation.clip.zero_shot import orthogonal_head as orthogonal_head
from nufilt_jax.evaluation.in_memory import Task as Task
from nufilt_jax.evaluation.in_memory import accuracy as accuracy
from nufilt_jax.evaluation.in_memory import evaluate_tasks as evaluate_tasks
from nufilt_jax.evaluation.metrics import accuracy_matrix as accuracy_matrix
from nufilt_jax.evaluation.metrics import average_accuracy as average_accuracy
from nufilt_jax.evaluation.metrics import backward_transfer as backward_transfer
