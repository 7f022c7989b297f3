"""What any method on stacks of matrices needs: products, certified leading subspaces, LAPACK calls one at a time."""
