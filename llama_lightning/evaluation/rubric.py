"""The scale that responses are graded on: the original's five levels, word for word.

It knows no judge and no prompt.
"""

LEVELS = {
    1: "The response fails to address the instructions, providing irrelevant, incorrect, or "
    "excessively verbose information that detracts from the user's request.",
    2: "The response partially addresses the instructions but includes significant inaccuracies, "
    "irrelevant details, or excessive elaboration that detracts from the main task.",
    3: "The response follows the instructions with some minor inaccuracies or omissions. It is "
    "generally relevant and clear, but may include some unnecessary details or could be more "
    "concise.",
    4: "The response adheres to the instructions, offering clear, accurate, and relevant "
    "information in a concise manner, with only occasional, minor instances of excessive detail or "
    "slight lack of clarity.",
    5: "The response fully adheres to the instructions, providing a clear, accurate, and relevant "
    "answer in a concise and efficient manner. It addresses all aspects of the request without "
    "unnecessary details or elaboration.",
}
RUBRIC = "\n".join(f"{level}: {text}" for level, text in LEVELS.items())
# What the levels are about, for prompts that ask for it; the original has no such line.
CRITERION = (
    "Does the response follow the instructions with clear, accurate and relevant information, and "
    "without unnecessary detail?"
)
