"""What is here and what is missing, told before anything is paid for: the job behind `keysync doctor`."""
