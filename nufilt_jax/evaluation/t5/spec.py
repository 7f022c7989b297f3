"""Text tasks as data: which examples, what the model is asked, and which answer is right."""

import dataclasses
import string


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpec:
    """A task that a model answers with text; in JSON an object with `"kind": "text"` and these keys.

    Attributes:
      dataset: Hub id, or a folder: then it starts with `/`, `./`, `../` or `~`, and counts from the JSON file.
      split: of the data set, the one that scores are reported on.
      prompt: the question, with the names of columns in braces where an example's values go.
      answers: text of the right answer by label, a whole number from 0; the score is then the share of right answers.
      number: format of the label as a text, such as `{:.1f}`, for labels that are numbers; the score is then Spearman's
        rank correlation of the numbers that the model writes and the right ones. Either this or `answers`.
      config: of the data set, if it has several.
      revision: of the Hub id; None for its main branch.
      label: column of the labels.
    """

    dataset: str
    split: str
    prompt: str
    answers: tuple[str, ...] | None = None
    number: str | None = None
    config: str | None = None
    revision: str | None = None
    label: str = "label"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the prompt names, in their order."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None))

    def faults(self) -> dict[str, str]:
        """What is wrong with the values, by key."""
        found: dict[str, str] = {}
        try:
            if not self.columns or any(
                not name or name.isdecimal() or "." in name or "[" in name for name in self.columns
            ):
                found["prompt"] = f"{self.prompt!r} must name columns in braces, as in {{sentence}}"
        except ValueError as error:
            found["prompt"] = f"{self.prompt!r}: {error}"
        if (self.answers is None) == (self.number is None):
            found["answers"] = "give the text of each label, or instead the format of a 'number'"
        if self.answers is not None and (len(self.answers) < 2 or len(set(self.answers)) < len(self.answers)):
            found["answers"] = "must be two or more different texts"
        if self.number is not None and not _is_number_format(self.number):
            found["number"] = f"{self.number!r} must be the format of a number, as {{:.1f}} is"
        return found


def _is_number_format(text: str) -> bool:
    try:
        return float(text.format(1.0)) != float(text.format(4.0))
    except (ValueError, LookupError, AttributeError):
        return False
