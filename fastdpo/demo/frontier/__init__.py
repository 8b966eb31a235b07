"""`fastdpo demo --frontier`: the DPO paper's claims (arXiv 2305.18290), reproduced where the truth
is known: a world of 262,144 answers, in which reward, KL and the optimum are sums, not estimates.

world       the words, the prompts, the rewards
models      small Hugging Face models: enumerated, sampled, scored
truth       exact sums over all answers: KL, Z, the optimum, the frontier, best of N, win rates
reference   supervised fine-tuning on film reviews made by a chain of words
data        preference pairs: 4 answers a prompt, 6 pairs, and the ways to label them
preference  training on pairs, by fastdpo.integrations.hf.dpo_loss, and the paper's two baselines
ppo         a reward model, and PPO against it or against the true reward
rloo        TRL's RLOO trainer, where TRL is installed
evaluate    a policy measured exactly along its training
settings    the sizes of a sweep
plan        which runs it consists of
lab         what the runs share
methods     how each of them is run
exact       the truth that the figures draw behind them
sweep       one JSON per run, resumed after a kill
worker      a process of a sweep
results     the records, and merging them
summary     the first figure in numbers
canvas      how figures look; figures, figures_frontier, figures_caveats, figures_further
command     the command line
scale       the same study for a model and a vocabulary that cannot be enumerated (for a GPU)
"""
