"""Names of what a run folder holds."""

STUDENT_FOLDER = "student"
