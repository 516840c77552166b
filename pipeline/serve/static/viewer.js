// The image and its labels, drawn by NiiVue. Everything here is in voxels (x, y, z) of the display
// grid: the server has turned image and labels so that x points right, y forward and z up in the
// patient, as nearly as the scan allows. Axis 0, 1, 2: sagittal, coronal, axial slices.

import { Niivue, NVImage, SLICE_TYPE } from "./vendor/niivue.js";

const SLICE_TYPES = [SLICE_TYPE.SAGITTAL, SLICE_TYPE.CORONAL, SLICE_TYPE.AXIAL];

/** Where the left, right, upper and lower edge of the picture point to, per axis of the slices. */
const EDGES = [["A", "P", "S", "I"], ["R", "L", "S", "I"], ["R", "L", "A", "P"]];
const RIM = 2; // labels are twice as opaque at their rim

export class Viewer {
  /** `redrawn` is called when the picture has moved. */
  constructor(canvas, redrawn) {
    this.canvas = canvas;
    this.redrawn = redrawn;
    this.shape = null;
    this.axis = 2;
    this.opacity = 0.45;
    this.niivue = new Niivue({
      interactive: false,
      dragAndDropEnabled: false,
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      crosshairWidth: 0,
      isOrientationTextVisible: false,
      loadingText: "",
      logLevel: "error",
      sliceType: SLICE_TYPE.AXIAL,
    });
  }

  async attach() {
    await this.niivue.attachToCanvas(this.canvas);
    new ResizeObserver(() => requestAnimationFrame(() => this.redrawn())).observe(this.canvas);
  }

  /** Show one channel; with `keep` the view stays as it is. */
  async load(bytes, shape, { keep }) {
    const view = this.niivue;
    const before = view.drawBitmap;
    const image = await NVImage.loadFromUrl({ url: bytes, name: "image.nii" });
    for (const old of [...view.volumes]) view.removeVolume(old);
    view.addVolume(image);
    this.shape = shape;
    this.automatic = [image.cal_min, image.cal_max];
    this.range = extremes(image.img);
    view.createEmptyDrawing();
    if (keep && before) {
      view.drawBitmap.set(before);
      view.refreshDrawing(false);
    } else {
      view.scene.crosshairPos = [0.5, 0.5, 0.5];
      view.scene.pan2Dxyzmm = [0, 0, 0, 1];
      shape.forEach((_, axis) => this.#place(axis, Math.floor(shape[axis] / 2)));
    }
    this.setOpacity(this.opacity);
  }

  /** Give label values their colours: pairs of value and [red, green, blue]. */
  setColours(pairs) {
    const map = { I: [0], R: [0], G: [0], B: [0], A: [0], labels: ["background"] };
    for (const [value, [red, green, blue]] of pairs) {
      map.I.push(value);
      map.R.push(red);
      map.G.push(green);
      map.B.push(blue);
      map.A.push(255);
      map.labels.push(String(value));
    }
    this.niivue.setDrawColormap(map);
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.niivue.drawRimOpacity = Math.min(1, RIM * opacity);
    this.niivue.setDrawOpacity(opacity);
  }

  setAxis(axis) {
    this.axis = axis;
    this.niivue.setSliceType(SLICE_TYPES[axis]);
    this.#draw();
  }

  get edges() {
    return EDGES[this.axis];
  }

  get slice() {
    return this.#index(this.axis);
  }

  get slices() {
    return this.shape ? this.shape[this.axis] : 0;
  }

  setSlice(index) {
    this.#place(this.axis, Math.max(0, Math.min(this.slices - 1, index)));
    this.#draw();
  }

  /** Set the window: the values that are black and white. */
  setWindow(black, white) {
    const image = this.niivue.volumes[0];
    [image.cal_min, image.cal_max] = [black, white];
    this.niivue.updateGLVolume();
  }

  /** Write new label values into a half-open box [[x1, x2], [y1, y2], [z1, z2]]; x runs fastest. */
  setLabels([[x1, x2], [y1, y2], [z1, z2]], values) {
    const [width, height] = this.shape;
    const bitmap = this.niivue.drawBitmap;
    let start = 0;
    for (let z = z1; z < z2; z++) {
      for (let y = y1; y < y2; y++) {
        bitmap.set(values.subarray(start, start + x2 - x1), x1 + width * (y + height * z));
        start += x2 - x1;
      }
    }
    this.niivue.refreshDrawing(true);
  }

  labelAt(voxel) {
    const [x, y, z] = voxel.map(Math.round);
    return this.niivue.drawBitmap[x + this.shape[0] * (y + this.shape[1] * z)];
  }

  valueAt(voxel) {
    const [x, y, z] = voxel.map(Math.round);
    return this.niivue.volumes[0].getValue(x, y, z);
  }

  /** Return the continuous voxel under a place on the canvas (CSS pixels), null beside the image. */
  voxelAt(x, y) {
    const { origin, right, down } = this.#plane();
    const voxel = origin.map((start, i) => start + x * right[i] + y * down[i]);
    voxel[this.axis] = this.slice;
    const inside = voxel.every((v, i) => v >= -0.5 && v <= this.shape[i] - 0.5);
    return inside ? voxel : null;
  }

  /** Return the place on the canvas (CSS pixels) of a voxel of this slice. */
  canvasAt(voxel) {
    const { origin, right, down } = this.#plane();
    const [i, j] = [0, 1, 2].filter((axis) => axis !== this.axis);
    const [p, q] = [voxel[i] - origin[i], voxel[j] - origin[j]];
    const determinant = right[i] * down[j] - down[i] * right[j];
    return [
      (p * down[j] - q * down[i]) / determinant,
      (q * right[i] - p * right[j]) / determinant,
    ];
  }

  /** Return how many CSS pixels a voxel is wide, averaged over both directions. */
  get pixelsPerVoxel() {
    const { right, down } = this.#plane();
    return 1 / Math.sqrt(Math.hypot(...right) * Math.hypot(...down));
  }

  /** Zoom by a factor about the middle of the picture. */
  zoom(factor) {
    const pan = this.niivue.scene.pan2Dxyzmm;
    const zoom = Math.max(1, Math.min(20, pan[3] * factor));
    this.niivue.setPan2Dxyzmm(zoom === 1 ? [0, 0, 0, 1] : [pan[0], pan[1], pan[2], zoom]);
    this.redrawn();
  }

  fit() {
    this.niivue.setPan2Dxyzmm([0, 0, 0, 1]);
    this.redrawn();
  }

  /** Move the picture by CSS pixels. */
  pan(x, y) {
    const { right, down } = this.#plane();
    const pan = [...this.niivue.scene.pan2Dxyzmm];
    const { pixDimsRAS } = this.niivue.volumes[0];
    for (let i = 0; i < 3; i++) pan[i] += (x * right[i] + y * down[i]) * pixDimsRAS[i + 1] * pan[3];
    this.niivue.setPan2Dxyzmm(pan);
    this.redrawn();
  }

  /** Continuous voxel at the canvas's corner, and per CSS pixel to the right and down. */
  #plane() {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const scale = this.canvas.width / width;
    const at = (x, y) => {
      const fraction = this.niivue.screenXY2TextureFrac(x * scale, y * scale, 0, false);
      return this.shape.map((size, i) => fraction[i] * size - 0.5);
    };
    const [a, b, c] = [at(width / 4, height / 4), at(width / 2, height / 4), at(width / 4, height / 2)];
    const right = b.map((v, i) => (v - a[i]) / (width / 4));
    const down = c.map((v, i) => (v - a[i]) / (height / 4));
    const origin = a.map((v, i) => v - (right[i] * width) / 4 - (down[i] * height) / 4);
    return { origin, right, down };
  }

  #index(axis) {
    if (!this.shape) return 0;
    return Math.round(this.niivue.scene.crosshairPos[axis] * this.shape[axis] - 0.5);
  }

  #place(axis, index) {
    const position = [...this.niivue.scene.crosshairPos];
    position[axis] = (index + 0.5) / this.shape[axis];
    this.niivue.scene.crosshairPos = position;
  }

  #draw() {
    this.niivue.drawScene();
    this.redrawn();
  }
}

function extremes(values) {
  let [low, high] = [values[0], values[0]];
  for (const value of values) {
    if (value < low) low = value;
    else if (value > high) high = value;
  }
  return [low, high];
}
