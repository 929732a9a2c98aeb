"""Many ranks, one decision."""
