"""One process that serves every size of a family over OpenAI's API: scheduler, engine thread, HTTP."""
