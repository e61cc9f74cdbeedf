"""Settings of a course for nbgrader: they lie in the folder in which its commands are run."""

c = get_config()  # noqa: F821 - nbgrader puts it there

c.CourseDirectory.course_id = "norms"
# Seconds that a cell may take: three trainings, on a computer that is slow or busy.
c.Execute.timeout = 300
# How files are named that students hand in by a learning platform: jane-doe_normalization.ipynb.
c.FileNameCollectorPlugin.named_regexp = (
    r".*/(?P<student_id>[^/_]+)_(?P<file_id>normalization)[^/]*\.ipynb"
)
