"""The student's times in a recipe, and what they allow."""

from distmatch.diffusion.sampler import Steps
from distmatch.diffusion.schedule import Schedule
from distmatch.recipe.entries import Recipe
from distmatch.system.errors import UserError


def student_steps(recipe: Recipe, schedule: Schedule) -> Steps:
    """Return the student's times. Raises `UserError` if one is outside the schedule."""
    asked = recipe.student
    if asked.nfe is not None:
        return Steps.spaced(schedule, asked.nfe, asked.shift)
    times = (schedule.t_max,) if asked.times is None else asked.times
    if not all(schedule.t_min < t <= schedule.t_max for t in times):
        said = ", ".join(f"{t:g}" for t in times)
        raise UserError(f"student.times is {said}; expected times above {schedule.t_min:g}, up to {schedule.t_max:g}")
    if recipe.pairs.taken is not None and times[0] != schedule.t_max:
        raise UserError(
            f"pairs.taken is for students that start where the teacher does, at {schedule.t_max:g}; student.times "
            f"start at {times[0]:g}"
        )
    return Steps(times)
