"""KnOTS-TIES once more: float64 NumPy, direction by direction, no code shared with the package."""

import numpy as np
import oracle_ties


def update(d, tau, *, density, cutoff):
    """U diag(σ) R of one layer: what is added to D, but for λ. The basis is cast to float32, as it is published."""
    n = d.shape[1]
    c = np.hstack([np.asarray(d, np.float64), np.asarray(tau, np.float64)])
    u, s, vt = np.linalg.svd(c, full_matrices=False)
    kept = [k for k in range(len(s)) if s[k] > cutoff]
    if not kept:
        return np.zeros(d.shape)
    rows = [vt[k].astype(np.float32) for k in kept]
    z = oracle_ties.kernel(
        np.concatenate([row[:n] for row in rows]), np.concatenate([row[n:] for row in rows]), density
    )
    parts = zip(kept, z.reshape(len(kept), n), strict=True)
    return sum(np.float64(np.float32(s[k])) * np.outer(u[:, k].astype(np.float32), row) for k, row in parts)
