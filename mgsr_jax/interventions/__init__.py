"""Changes that the teacher makes to a rollout; scrg.py is one more, the method's."""
