// The saved states of a run folder, beside the journal: what `Session.finetune` in Python writes and reads.
//
//     start.safetensors     the state before the first step
//     snapshot.safetensors  the state after some step, so that a restart replays only what came later
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "journal.h"
#include "program.h"

namespace host {

constexpr char kJournal[] = "journal";
constexpr char kStart[] = "start.safetensors";
constexpr char kSnapshot[] = "snapshot.safetensors";
constexpr char kPrivacy[] = "privacy.json";  // of private runs, whose steps are made in Python

// The file appears whole or not at all. Throws `Failure`.
void write_state(const std::filesystem::path& path, const Program& program, size_t step);

// The journal of a run, which is made if there is none; what had to be mended is said on stderr. Throws `Failure`.
std::unique_ptr<Journal> open_journal(const std::filesystem::path& folder, const Program& program);

// Set the state to the end of the run: the newest saved state that can be read and that the journal reaches, and a
// replay of the steps since then. What could not be used on the way is said on stderr.
// Throws `Failure` where no saved state can be used, or steps since then cannot be replayed.
void restore(const std::filesystem::path& folder, const std::vector<Record>& records, Program& program);

}  // namespace host
