"""Restore drills: prove that a backup comes up and is sound, on a diff that is thrown away."""
