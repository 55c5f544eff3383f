"""The kernel's side: mounting, serving a mount, and pyfuse3's operations over the tree."""
