// What threads log in a pass.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "pass.h"

namespace rose {
namespace cpu {

// Of one chunk: entries [begin, end) of a block; places count from the chunk's first tile.
struct Piece {
  int64_t first_tile, begin, end;
};

struct LogBlock {
  static constexpr int64_t kEntries = 1 << 16;
  static constexpr size_t kSize = kEntries + kRun + kMostLanes;
  uint32_t keys[kSize], places[kSize];
  float old[4][kSize];
  int64_t logged;
  std::vector<Piece> pieces;
};

// Memory that comes and goes costs page faults: blocks are kept for the next step.
class SpareBlocks {
 public:
  std::unique_ptr<LogBlock> take() {
    std::unique_ptr<LogBlock> block;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        block = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (!block) block.reset(new LogBlock);  // its arrays are not touched
    block->logged = 0;
    block->pieces.clear();
    return block;
  }
  void give_back(std::vector<std::unique_ptr<LogBlock>>&& blocks) {
    constexpr size_t kMost = 64;
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& block : blocks) {
      if (free_.size() < kMost) free_.push_back(std::move(block));
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<LogBlock>> free_;
};

inline SpareBlocks& spare_blocks() {
  static SpareBlocks* blocks = new SpareBlocks;
  return *blocks;
}

// A thread's log: room for a run at any time.
class ThreadLog {
 public:
  explicit ThreadLog(Body::Logs what) : what_(what) {}

  // For a chunk.
  void open(Notes& notes) {
    recent_.clear();
    if (blocks_.empty()) blocks_.push_back(spare_blocks().take());
    enter(notes);
  }
  // Called before every run.
  void make_room(Notes& notes, int64_t first_tile) {
    if (notes.logged <= LogBlock::kEntries) return;
    close(notes, first_tile);
    blocks_.push_back(spare_blocks().take());
    enter(notes);
  }
  // What was logged since the last call is of the chunk that begins at `first_tile`.
  void close(Notes& notes, int64_t first_tile) {
    LogBlock& block = *blocks_.back();
    if (notes.logged > block.logged) {
      block.pieces.push_back({first_tile, block.logged, notes.logged});
      recent_.push_back({block.keys + block.logged, block.keys + notes.logged});
    }
    block.logged = notes.logged;
  }
  // fn(key) for what was logged since the log was opened; once it is closed.
  template <typename Fn>
  void for_each_recent_key(Fn fn) const {
    for (const auto& keys : recent_) {
      for (const uint32_t* key = keys.first; key != keys.second; ++key) fn(*key & ~kInactiveKey);
    }
  }
  std::vector<std::unique_ptr<LogBlock>>& blocks() { return blocks_; }

 private:
  void enter(Notes& notes) const {
    LogBlock& block = *blocks_.back();
    notes.logged = block.logged;
    notes.keys = block.keys;
    notes.places = what_ == Body::Logs::kKeys ? nullptr : block.places;
    for (int k = 0; k < 4; ++k) notes.old[k] = block.old[k];
  }

  Body::Logs what_;
  std::vector<std::unique_ptr<LogBlock>> blocks_;
  std::vector<std::pair<const uint32_t*, const uint32_t*>> recent_;
};

}  // namespace cpu
}  // namespace rose
