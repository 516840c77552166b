// The open case: its image, its label map, and the steps that change it.

import { get, getBytes, post, unpack } from "./api.js";

export class OpenCase {
  /** `shown` is the server's description; `changed` is called after every change. */
  constructor(shown, viewer, changed) {
    this.name = shown.name;
    this.shape = shown.shape;
    this.toWorld = shown.to_world;
    this.channels = shown.channels;
    this.viewer = viewer;
    this.changed = changed;
    this.marks = [];
    this.unsaved = false;
    this.revision = null; // null: the label map is still being computed
    this.queue = Promise.resolve();
  }

  async showImage(channel, { keep }) {
    const bytes = await getBytes(`/api/image?channel=${channel}`);
    await this.viewer.load(bytes, this.shape, { keep });
  }

  async loadLabels() {
    await this.#apply(await get("/api/label_map"));
  }

  point(label, positive, voxel) {
    return this.#step("/api/point", { label, positive, world: this.worldOf(voxel) });
  }

  scribble(label, positive, voxels, radius) {
    const world = voxels.map((voxel) => this.worldOf(voxel));
    return this.#step("/api/scribble", { label, positive, world, radius });
  }

  undo() {
    return this.#step("/api/undo", {});
  }

  reset() {
    return this.#step("/api/reset", {});
  }

  suggestSlice() {
    return this.#after(() => post("/api/suggest_slice", { case: this.name }));
  }

  async save({ overwrite }) {
    const files = await this.#after(() => post("/api/save", { case: this.name, overwrite }));
    this.unsaved = false;
    this.changed();
    return files;
  }

  /** Return RAS millimetres of a voxel of the display grid. */
  worldOf(voxel) {
    return this.toWorld
      .slice(0, 3)
      .map((row) => row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + row[3]);
  }

  /** One change, after those before it. */
  #step(path, message) {
    return this.#after(async () => {
      const update = await post(path, { case: this.name, ...message });
      const missed = update.revision !== this.revision + 1; // made in another tab
      await this.#apply(missed ? await get("/api/label_map") : update);
    });
  }

  #after(action) {
    const result = this.queue.then(action);
    this.queue = result.catch(() => {});
    return result;
  }

  async #apply({ revision, box, voxels, marks, unsaved }) {
    if (box) this.viewer.setLabels(box, await unpack(voxels));
    Object.assign(this, { revision, marks, unsaved });
    this.changed();
  }
}
