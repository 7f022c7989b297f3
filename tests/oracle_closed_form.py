"""The closed form once more: float64 NumPy, least squares on explicit matrices, no code shared with the package."""

import numpy as np
from oracle import leading, projector


def surrogate(d, tau, update, v1, v2):
    """Eq. 16 of any update: what the new task loses on V1, and what the earlier ones feel on V2."""
    return np.sum(((tau - d - update) @ v1) ** 2) + np.sum((update @ v2) ** 2)


def smallest_answer(wish, v1, v2, ridge):
    """The least ‖E V1 − wish‖² + λ ‖E‖² of all E = G Nᵀ, with N an orthonormal basis of what is orthogonal to V2."""
    n = len(v1)
    basis = np.linalg.svd(np.hstack([v2, np.zeros((n, 1))]))[0][:, v2.shape[1] :]
    system = np.vstack([v1.T @ basis, np.sqrt(ridge) * np.eye(basis.shape[1])])
    wanted = np.vstack([wish.T, np.zeros((basis.shape[1], len(wish)))])
    return np.linalg.lstsq(system, wanted, rcond=None)[0].T @ basis.T


def closed_form_update(d, tau, *, filter_rank, task_rank, ridge):
    """Δ = τP + E of one layer, and the surrogate without and with E."""
    d, tau = (np.asarray(x, np.float64) for x in (d, tau))
    v2, v1 = leading(d, filter_rank), leading(tau, task_rank)
    kept = tau @ projector(d, filter_rank)
    update = kept + smallest_answer((tau - d - kept) @ v1, v1, v2, ridge)
    return update, np.array([surrogate(d, tau, x, v1, v2) for x in (kept, update)])
