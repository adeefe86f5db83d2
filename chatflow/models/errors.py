class PromptTooLongError(ValueError):
    pass
