// What lies on top of the image: the clicks of this slice, the stroke being drawn, and below the
// image a line that shows which slices have clicks.

import { css } from "./palette.js";

const POINT = 6; // CSS pixels

export class Ink {
  constructor(canvas, track, viewer) {
    this.canvas = canvas;
    this.track = track;
    this.viewer = viewer;
    this.marks = []; // {points: [[x, y, z], ...], positive, radius, colour}
    this.stroke = null; // the same, while it is drawn
  }

  draw() {
    const pen = prepared(this.canvas);
    if (!this.viewer.shape) return;
    const { axis, slice } = this.viewer;
    for (const mark of [...this.marks, this.stroke]) {
      if (!mark) continue;
      const here = mark.points.filter((point) => Math.abs(point[axis] - slice) <= 0.5);
      if (!here.length) continue;
      const places = here.map((point) => this.viewer.canvasAt(point));
      if (mark.radius) this.#line(pen, places, mark);
      else this.#point(pen, places[0], mark);
    }
    this.#edges(pen);
    this.#annotated();
  }

  /** Write where the edges of the picture point to in the patient. */
  #edges(pen) {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const places = [[14, height / 2], [width - 14, height / 2], [width / 2, 16], [width / 2, height - 14]];
    pen.font = "600 13px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillStyle = "#aeb8c4";
    places.forEach((place, i) => pen.fillText(this.viewer.edges[i], ...place));
  }

  #point(pen, [x, y], { colour, positive, pending }) {
    pen.globalAlpha = pending ? 0.55 : 1;
    pen.beginPath();
    pen.arc(x, y, POINT, 0, 2 * Math.PI);
    pen.fillStyle = positive ? css(colour) : "rgb(20 20 20 / 0.75)";
    pen.fill();
    pen.lineWidth = 2;
    pen.strokeStyle = positive ? "#fff" : css(colour);
    pen.stroke();
    if (!positive) {
      pen.beginPath();
      pen.moveTo(x - 3, y);
      pen.lineTo(x + 3, y);
      pen.strokeStyle = "#fff";
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  #line(pen, places, { colour, positive, radius }) {
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = Math.max(2, 2 * radius * this.viewer.pixelsPerVoxel);
    pen.strokeStyle = positive ? css(colour, 0.55) : "rgb(20 20 20 / 0.55)";
    strokeThrough(pen, places);
    pen.lineWidth = 1.5;
    pen.strokeStyle = positive ? "#fff" : css(colour);
    pen.setLineDash(positive ? [] : [5, 4]);
    strokeThrough(pen, places);
    pen.setLineDash([]);
  }

  #annotated() {
    const pen = prepared(this.track);
    const { axis, slices } = this.viewer;
    const width = this.track.clientWidth;
    const thumb = 16; // the slider's middle runs from half a thumb to half a thumb before the end
    for (const mark of this.marks) {
      for (const slice of new Set(mark.points.map((point) => Math.round(point[axis])))) {
        const place = slices > 1 ? slice / (slices - 1) : 0.5;
        pen.fillStyle = css(mark.colour);
        pen.fillRect(thumb / 2 + place * (width - thumb) - 1.5, 0, 3, 5);
      }
    }
  }
}

/** Return the pen of an emptied canvas that has as many pixels as it covers. */
function prepared(canvas) {
  const scale = window.devicePixelRatio;
  canvas.width = Math.round(canvas.clientWidth * scale);
  canvas.height = Math.round(canvas.clientHeight * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  return pen;
}

function strokeThrough(pen, places) {
  pen.beginPath();
  pen.moveTo(...places[0]);
  for (const place of places) pen.lineTo(...place);
  pen.stroke();
}
