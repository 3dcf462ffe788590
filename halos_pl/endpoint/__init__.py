"""A client of servers with OpenAI's chat completions API: vLLM, SGLang, llama.cpp or a hosted one."""
